"""A stand-in for `safe_open` that counts what is read through it."""

from sr_dpo_jax.weights import read


class Counting:
    """`safe_open` that adds up the bytes that leave it, and refuses whole tensors."""

    bytes_read = 0
    real = staticmethod(read.safe_open)

    def __init__(self, path, framework):
        self.file = self.real(path, framework=framework)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def get_slice(self, name):
        counted, part = self, self.file.get_slice(name)

        class Slice:
            def __getitem__(self, region):
                array = part[region]
                type(counted).bytes_read += array.nbytes
                return array

        return Slice()
