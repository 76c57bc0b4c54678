"""Matrix products of query heads with the keys, values or states that the heads of a group share.

Two layouts, one result. Where gradients are wanted, or on a GPU, the rows of a group's query heads are stacked and one
batched product does them all. On a CPU without gradients every query head has a product of its own, on views: nothing
is copied, and overlapping windows of keys need not be written out.
"""

import torch


def by_heads(x) -> bool:
    """Whether query heads keep their own products: [B, Hq, N, C, D] in place of [B, Hkv, N, G * C, D]."""
    return x.device.type == "cpu" and not torch.is_grad_enabled()


def product(a, b, out=None, bias=None, alpha: float = 1.0):
    """alpha * a @ b + bias, each query head with what its group shares.

    Args:
        a: [B, Hq, N, M, K], or [B, Hkv, N, G * M, K] stacked. b: [B, Hkv, N, K, S].
        bias: [B or 1, Hkv or 1, N or 1, M, S], or `out` itself, which is then added to.
    Returns:
        `out`, or a new tensor of a's layout. [..., M, S]
    """
    if not by_heads(a):
        product = a @ b if alpha == 1 else (a @ b) * alpha
        return product if bias is None else product + bias
    groups = a.shape[1] // b.shape[1]
    if out is None:
        out = a.new_empty(*a.shape[:-1], b.shape[-1])
    for row, (lefts, rights, outs) in enumerate(zip(a.unbind(0), b.unbind(0), out.unbind(0), strict=True)):
        rights = rights.unbind(0)
        for head, (left, target) in enumerate(zip(lefts.unbind(0), outs.unbind(0), strict=True)):
            right = rights[head // groups]
            if bias is None and alpha == 1:
                torch.bmm(left, right, out=target)
            elif bias is None:
                torch.baddbmm(target, left, right, beta=0, alpha=alpha, out=target)
            else:
                added = target if bias is out else bias[row % bias.shape[0], head // groups % bias.shape[1]]
                torch.baddbmm(added, left, right, alpha=alpha, out=target)
    return out
