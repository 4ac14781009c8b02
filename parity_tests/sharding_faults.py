"""Faults that are planted in the processes of rung 10, which nothing patched here reaches."""


def gradients_averaged():
    """What a data-parallel run does to sums: divided by the number of processes."""
    from torch.distributed.fsdp import FSDPModule

    FSDPModule.set_gradient_divide_factor = lambda self, factor: None


def words_by_place():
    """Random words that a device makes differently from one device alone."""
    import flax_impl.dropout

    flax_impl.dropout._high_word = lambda a, b: b >> 1


def dies():
    raise OSError("a device was lost")
