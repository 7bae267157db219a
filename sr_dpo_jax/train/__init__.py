"""Training: objective, state, train_step, optim, reference, program, setup, loop, and what a run writes down."""
