"""Matrix products of query heads with the keys, values or states that the heads of a group share.

Two layouts, one result. Where gradients are wanted, or on a GPU, the rows of a group's query heads are stacked and one
batched product does them all. On a CPU without gradients every query head has a product of its own, on views: nothing
is copied, and overlapping windows of keys need not be written out.
"""

import torch


def by_heads(x) -> bool:
    """Whether query heads keep their own products: [B, Hq, N, C, D] in place of [B, Hkv, N, G * C, D]."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def product(a, b, added_to=None):
    """a @ b, each query head with what its group shares.

    Args:
        a: [B, Hq, N, M, K], or [B, Hkv, N, G * M, K] stacked. b: [B, Hkv, N, K, S].
        added_to: what the product is added to, in place, without gradients on a CPU.
    Returns:
        `added_to`, or a new tensor of a's layout. [..., M, S]
    """
    if not by_heads(a):
        return a @ b
    groups = a.shape[1] // b.shape[1]
    out = a.new_empty(*a.shape[:-1], b.shape[-1]) if added_to is None else added_to
    for lefts, rights, targets in zip(a.unbind(0), b.unbind(0), out.unbind(0), strict=True):
        rights = rights.unbind(0)
        for head, (left, target) in enumerate(zip(lefts.unbind(0), targets.unbind(0), strict=True)):
            if added_to is None:
                torch.bmm(left, rights[head // groups], out=target)
            else:
                target.baddbmm_(left, rights[head // groups])
    return out
