"""First-in-first-out pipes of tensors between two processes. A link carries one channel in one direction.

    shared_memory.py   between processes of one host: a ring of preallocated buffers, a Unix socket for the tokens
    process_group.py   between hosts: torch.distributed's gloo, one process group per channel
    header.py          the fixed-size header of a message: dtype, shape, strides

Both send what they are given without waiting for the receiver; a thread on the receiving side delivers. Nothing is pickled.
"""

from .header import HEADER_BYTES
from .process_group import GroupReceiver, GroupSender
from .shared_memory import Door, RingSender

__all__ = ["HEADER_BYTES", "Door", "GroupReceiver", "GroupSender", "RingSender"]
