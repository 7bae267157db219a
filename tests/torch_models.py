"""Random PyTorch models of transformers, for tests that compare with them (extra `parity`)."""


def random_weights(torch, directory):
    """Weights of standard deviation 0.08: far from uniform predictions, so that an error shows."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    config.initializer_range = 0.08
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model
