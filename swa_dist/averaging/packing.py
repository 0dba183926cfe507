"""Small variables as one vector: one operation on it instead of one on each of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

# A packed value is a copy. Where it is large, the copy costs more than the operations saved.
_SMALL_BYTES = 2**20
_PACKED_BYTES = 8 * 2**20


def buffer_dtype(dtype: tf.DType) -> tf.DType:
    """Return the dtype in which weights of a dtype are averaged."""
    return dtype if dtype.size > tf.float32.size else tf.float32


def pack(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Return tensors of one dtype as one vector, one after the other."""
    flat = tf.constant([-1])
    return tf.concat([v if v.shape.rank == 1 else tf.reshape(v, flat) for v in values], 0)


def unpack(packed: tf.Tensor, shapes: Sequence[tf.TensorShape]) -> list[tf.Tensor]:
    """Return the tensors of these shapes of which `pack` made a vector."""
    parts = tf.split(packed, [shape.num_elements() for shape in shapes])
    return [
        part if shape.rank == 1 else tf.reshape(part, shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]


@dataclass(frozen=True)
class Group:
    """Weights that have a buffer together, or one weight that has its own.

    Args:
        indices: Which weights, in rising order.
        shapes: Their shapes.
        dtype: Their dtype.
    """

    indices: tuple[int, ...]
    shapes: tuple[tf.TensorShape, ...]
    dtype: tf.DType

    @property
    def shape(self) -> tf.TensorShape:
        """Shape of the group's values: a vector, or that of its only weight."""
        if len(self.shapes) == 1:
            return self.shapes[0]
        return tf.TensorShape([sum(shape.num_elements() for shape in self.shapes)])

    @property
    def buffer_dtype(self) -> tf.DType:
        """Dtype in which the weights are averaged."""
        return buffer_dtype(self.dtype)

    @property
    def is_narrow(self) -> bool:
        """Whether the weights are narrower than their buffer, and cannot hold the average."""
        return self.dtype != self.buffer_dtype

    def pack(self, values: Sequence[tf.Tensor]) -> tf.Tensor:
        """Return the values of the group's weights as one tensor of its shape."""
        return pack(values) if len(values) > 1 else values[0]

    def unpack(self, packed: tf.Tensor) -> list[tf.Tensor]:
        """Return the values of the group's weights, one by one."""
        return unpack(packed, self.shapes) if len(self.shapes) > 1 else [packed]

    def __str__(self) -> str:
        """Return which weights these are."""
        return "weights " + ", ".join(str(i + 1) for i in self.indices)


def groups_of(variables: Sequence[tf.Variable]) -> list[Group]:
    """Divide weights into groups: the small ones of each dtype, and each other one by itself.

    Small are those below 1 MiB, the smallest first until they have 8 MiB in all. A packed value is
    in memory for the time of an operation, so that no more than these 8 MiB are.

    Args:
        variables: The weights.

    Returns:
        Groups in the order of their first weights. They depend on nothing but the weights: a
        checkpoint of the buffers can be restored on other devices.
    """
    sizes = [v.shape.num_elements() * buffer_dtype(v.dtype).size for v in variables]
    packed: dict[tf.DType, list[int]] = {}
    left = _PACKED_BYTES
    for i in sorted(range(len(variables)), key=sizes.__getitem__):
        left -= sizes[i]
        if sizes[i] >= _SMALL_BYTES or left < 0:
            break
        packed.setdefault(variables[i].dtype, []).append(i)
    together = [sorted(indices) for indices in packed.values()]
    alone = set(range(len(variables))).difference(*together)
    return [
        Group(
            tuple(indices), tuple(variables[i].shape for i in indices), variables[indices[0]].dtype
        )
        for indices in sorted([*together, *([i] for i in alone)])
    ]


class Layout(tf.train.experimental.PythonState):
    """What buffers hold, as part of their checkpoint, which is not restored into other ones.

    Args:
        layout: What each buffer, and each thing in it, is, in words.
    """

    def __init__(self, layout: Mapping[str, str]) -> None:
        super().__init__()
        self._layout = dict(layout)

    def serialize(self) -> str:
        """Return the layout as JSON."""
        return json.dumps(self._layout)

    def deserialize(self, string_value: str) -> None:
        """Refuse another layout. TensorFlow calls this before it assigns anything."""
        saved = json.loads(string_value)
        for name in [*self._layout, *saved]:
            here, there = (layout.get(name, "nothing") for layout in (self._layout, saved))
            if here != there:
                raise ValueError(
                    "An average must be restored from a checkpoint of the same weights in the same "
                    f"buffers. Received: {name}={here!r}, but {name}={there!r} in the checkpoint."
                )
