"""The registered op of attention and its derivatives: quantized forward, straight-through derivatives of exact attention."""

from __future__ import annotations

import torch

from rfkernels import _dispatch, _registry
from rfkernels.ops._attention_derivatives import gradients, recomputed, tangents
from rfkernels.ops._attention_run import new_lse, new_output, run
from rfkernels.ops._first_derivative import first_derivatives

_NO_SECOND = (
    "attention: the gradient of quantized attention has no derivative of its own; for second derivatives take "
    "torch.nn.functional.scaled_dot_product_attention, or float64 inputs, which go there"
)


class Attention(torch.autograd.Function):
    """Calls that record a gradient, and calls under vmap, torch.func and forward-mode differentiation.

    Arguments: q, k, v, attn_mask, is_causal, scale, precision, scheme, return_lse.
    """

    @staticmethod
    def forward(*args):
        if _dispatch.plain(*args[:4]):
            return run(*args)
        with _registry.below_autograd():
            return attention_op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, ctx.return_lse = inputs[4:6], inputs[8]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        if not inputs[8]:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, grad_lse):
        wanted = ctx.needs_input_grad[:4]
        if grad is None and grad_lse is None:
            return (None,) * 9
        plain = not _dispatch.transforms_active()
        derive = recomputed if plain else gradients
        grads = derive(*ctx.saved_tensors, *ctx.options, wanted, grad, grad_lse)
        if plain and torch.is_grad_enabled():  # create_graph=True
            grads = first_derivatives(grads, _NO_SECOND)
        return *grads, *(None,) * 5

    @staticmethod
    def jvp(ctx, q_t, k_t, v_t, mask_t, *_):
        out_t, lse_t = tangents(*ctx.saved_tensors, *ctx.options, q_t, k_t, v_t, mask_t)
        return out_t, lse_t if ctx.return_lse else None

    @staticmethod
    def vmap(info, in_dims, *args):
        """The mapped dimension becomes part of the batch."""
        size, batch = info.batch_size, args[0].ndim - (in_dims[0] is not None)
        tensors = []
        for tensor, dim in zip(args[:4], in_dims[:4], strict=True):
            if tensor is None:
                tensors.append(None)
                continue
            if dim is None:
                tensor = tensor.expand(size, *tensor.shape)
            else:
                tensor = tensor.movedim(dim, 0)
            if tensor.ndim <= batch:  # a mask of fewer dimensions
                tensor = tensor.reshape(size, *(1,) * (batch + 1 - tensor.ndim), *tensor.shape[1:])
            tensors.append(tensor)
        q, mask = tensors[0], tensors[3]
        if mask is not None:
            tensors[3] = mask.expand(size, q.shape[1], *mask.shape[2:])
        folded = [None if t is None else t.flatten(0, 1) for t in tensors]
        out, lse = Attention.apply(*folded, *args[4:])
        out = out.unflatten(0, (size, q.shape[1]))
        if args[8]:
            return (out, lse.unflatten(0, (size, q.shape[1]))), (0, 0)
        return (out, lse), (0, None)


def _fake(q, k, v, attn_mask, is_causal, scale, precision, scheme, return_lse):
    return new_output(q, v.shape[3]), new_lse(q, return_lse)


attention_op = _registry.register(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, float scale, str precision, str scheme, "
    "bool return_lse) -> (Tensor, Tensor)",
    kernel=run,
    fake=_fake,
    autograd=Attention.apply,
)
