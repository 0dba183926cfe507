"""What interrupts runs, and damages the files of their checkpoints."""


class KilledError(Exception):
    """What ends a `fit` without its `on_train_end`, as a kill does."""


def kill(model):
    raise KilledError


def spoil(folder, epoch, ending=".data-00000-of-00001", damage="truncated"):
    """Damage a file of the checkpoint after an epoch."""
    path = folder / f"swa-epoch-{epoch:05d}{ending}"
    content = bytearray(path.read_bytes())
    if damage == "altered":
        content[10] ^= 1
    else:
        content = content[: len(content) // 2 if damage == "truncated" else 0]
    path.write_bytes(content)
