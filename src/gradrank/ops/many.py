"""One call for an operation on hundreds of small tensors, as torch's own optimizers make it.

``many._foreach_add_(tensors, others)`` and its kin are stable in torch, but its type stubs do not
export them.
"""

from typing import Any

import torch

many: Any = torch
