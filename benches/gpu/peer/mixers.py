"""Peers of what mixes tokens: flash-linear-attention, transformers' chunked rule, convolutions, torch's attention."""
import math

from peer import DEVICE, backward_of, cycled, normal, package, turns

# Tokens of a document that float32 follows one by one.
FOLLOWED = 64


def document_length(s):
    return s["tokens"] // s["documents"]


def offsets(torch, s):
    return torch.arange(0, s["tokens"] + 1, document_length(s), device=DEVICE[0], dtype=torch.long)


def delta_operands(torch, s, gradient):
    keys, values = (1, s["tokens"], s["keys"], s["dim"]), (1, s["tokens"], s["heads"], s["dim"])
    unit = 1 / math.sqrt(s["dim"])
    q, k, v = normal(torch, keys, unit), normal(torch, keys, unit), normal(torch, values)
    g = -0.05 * torch.randn(values[:3], device=DEVICE[0]).exp()
    beta = torch.randn(values[:3], device=DEVICE[0]).sigmoid().to(torch.bfloat16)
    return [tensor.requires_grad_(gradient) for tensor in (q, k, v, g, beta)]


def token_by_token(torch, q, k, v, g, beta):
    """The rule as it is defined, in float32, from an empty state: tensors [tokens, heads, dim]."""
    factor = v.shape[1] // q.shape[1]
    q, k = (x.float().repeat_interleave(factor, dim=1) for x in (q, k))
    v, g, beta = v.float(), g.float(), beta.float()
    state = torch.zeros(v.shape[1], q.shape[2], v.shape[2], device=v.device)
    out = []
    for t in range(q.shape[0]):
        state = state * g[t].exp()[:, None, None]
        change = (v[t] - torch.einsum("hkv,hk->hv", state, k[t])) * beta[t][:, None]
        state = state + torch.einsum("hk,hv->hkv", k[t], change)
        out.append(torch.einsum("hkv,hk->hv", state, q[t]) / math.sqrt(q.shape[2]))
    return torch.stack(out)


def delta_call(torch, operands, forward, backward, flat):
    """The call, and its judge: outputs of the first tokens, or gradients of the last tokens' values, which no earlier token decides."""
    if not backward:
        def pairs():
            part = [x[0, :FOLLOWED] for x in operands]
            return [(flat(forward())[:FOLLOWED], token_by_token(torch, *part))]
        return forward, pairs
    out = forward()
    gradient = torch.randn_like(out)
    call = backward_of(torch, out, operands, gradient)

    def pairs():
        part = [x[0, -FOLLOWED:].detach().float() for x in operands]
        part[2].requires_grad_(True)
        expected, = torch.autograd.grad(token_by_token(torch, *part), part[2], flat(gradient)[-FOLLOWED:].float())
        return [(call()[2][0, -FOLLOWED:], expected)]
    return call, pairs


def delta_peers(torch, s, backward):
    length, factor = document_length(s), s["heads"] // s["keys"]

    def fla():
        rule = package("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        operands, ends = delta_operands(torch, s, backward), offsets(torch, s)
        q, k, v, g, beta = operands

        def forward():
            # Older versions want one key head for each value head.
            try:
                return rule(q, k, v, g, beta, cu_seqlens=ends)[0]
            except Exception:
                wide = [x.repeat_interleave(factor, dim=2) for x in (q, k)]
                return rule(*wide, v, g, beta, cu_seqlens=ends)[0]
        return delta_call(torch, operands, forward, backward, lambda out: out[0])

    def transformers():
        rule = package("transformers.models.qwen3_next.modeling_qwen3_next").torch_chunk_gated_delta_rule
        operands = delta_operands(torch, s, backward)

        def forward():
            apart = [x.view(s["documents"], length, *x.shape[2:]) for x in operands]
            wide = [x.repeat_interleave(factor, dim=2) for x in apart[:2]]
            return rule(*wide, *apart[2:])[0]
        return delta_call(torch, operands, forward, backward, lambda out: out.flatten(0, 1))
    yield "flash-linear-attention", fla
    yield "transformers torch_chunk_gated_delta_rule", transformers


def delta(torch, s, case):
    yield from delta_peers(torch, s, False)


def delta_backward(torch, s, case):
    yield from delta_peers(torch, s, True)


# ---- what comes before the rule --------------------------------------------------------------------------------------

def delta_inputs(torch, s, case):
    """Projections cut apart as transformers has it, convolution, SiLU, l2 norms of queries and keys, both gates."""
    tokens, keys, heads, dim = s["tokens"], s["keys"], s["heads"], s["dim"]
    factor, length = heads // keys, document_length(s)
    channels = (2 * keys + heads) * dim

    def operands():
        return (normal(torch, (tokens, 2 * (keys + heads) * dim)), normal(torch, (tokens, 2 * heads)),
                normal(torch, (channels, 4), 0.5), normal(torch, (heads,), 0.5, torch.float32), normal(torch, (heads,), 0.5, torch.float32))

    def all_of(fused, ba, a_log, dt_bias, convolve, unit):
        parts = fused.view(-1, keys, 2 * (1 + factor) * dim).split([dim, dim, factor * dim, factor * dim], dim=-1)
        q, k, v, z = (part.reshape(len(fused), -1) for part in parts)
        b, a = (part.reshape(len(ba), heads) for part in ba.view(-1, keys, 2 * factor).split([factor, factor], dim=-1))
        q, k, v = convolve(torch.cat((q, k, v), dim=-1)).split([keys * dim, keys * dim, heads * dim], dim=-1)
        decay = -a_log.exp() * torch.nn.functional.softplus(a.float() + dt_bias)
        return unit(q.view(-1, keys, dim)), unit(k.view(-1, keys, dim)), v, z, decay, b.sigmoid()

    def exact_unit(x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def batched(x, taps, count):
        functional = torch.nn.functional
        apart = x.view(count, -1, channels).transpose(1, 2)
        out = functional.silu(functional.conv1d(apart, taps[:, None], padding=3, groups=channels)[..., :apart.shape[-1]])
        return out.transpose(1, 2).reshape(-1, channels)

    def judged(given, convolve, unit):
        fused, ba, taps, a_log, dt_bias = given
        call = lambda: all_of(fused, ba, a_log, dt_bias, lambda x: convolve(x, taps), unit)

        def pairs():
            first = [fused[:FOLLOWED].float(), ba[:FOLLOWED].float()]
            expected = all_of(*first, a_log, dt_bias, lambda x: batched(x, taps.float(), 1), exact_unit)
            return [(ours[:FOLLOWED], other) for ours, other in zip(call(), expected)]
        return call, pairs

    def fla():
        convolution = package("fla.modules.convolution").causal_conv1d
        unit = package("fla.modules.l2norm").l2norm
        ends = offsets(torch, s)

        def convolve(x, taps):
            result = convolution(x[None], taps, activation="silu", cu_seqlens=ends)
            return (result[0] if isinstance(result, tuple) else result)[0]
        return judged(operands(), convolve, unit)

    def plain():
        unit = lambda x: exact_unit(x.float()).to(torch.bfloat16)
        return judged(operands(), lambda x, taps: batched(x, taps, s["documents"]), unit)
    yield "flash-linear-attention convolution and l2norm + torch", fla
    yield "torch conv1d, silu, norms, gates", plain


def convolution_backward(torch, s, case):
    length, channels = document_length(s), s["channels"]
    functional = torch.nn.functional

    def exact(x, weight, dy):
        """The gradient of the last document's input, in float32."""
        part = x[-length:].detach().float().T[None].requires_grad_(True)
        out = functional.silu(functional.conv1d(part, weight.float()[:, None], padding=3, groups=channels)[..., :length])
        return torch.autograd.grad(out, part, dy[-length:].float().T[None])[0][0].T

    def finish(forward, x, weight, flat):
        out = forward()
        gradient = torch.randn_like(out)
        call = backward_of(torch, out, (x,), gradient)
        return call, lambda: [(flat(call()[0])[-length:], exact(flat(x), weight, flat(gradient)))]

    def causal_conv1d():
        function = package("causal_conv1d").causal_conv1d_fn
        x = normal(torch, (s["documents"], length, channels)).transpose(1, 2).requires_grad_(True)
        weight = normal(torch, (channels, 4), 0.5)
        flat = lambda tensor: tensor.transpose(1, 2).reshape(-1, channels)
        return finish(lambda: function(x, weight, activation="silu"), x, weight, flat)

    def fla():
        function = package("fla.modules.convolution").causal_conv1d
        x, weight = normal(torch, (1, s["tokens"], channels)).requires_grad_(True), normal(torch, (channels, 4), 0.5)
        ends = offsets(torch, s)

        def forward():
            result = function(x, weight, activation="silu", cu_seqlens=ends)
            return result[0] if isinstance(result, tuple) else result
        return finish(forward, x, weight, lambda tensor: tensor[0])

    def plain():
        x = normal(torch, (s["documents"], channels, length)).requires_grad_(True)
        weight = normal(torch, (channels, 4), 0.5)
        forward = lambda: functional.silu(functional.conv1d(x, weight[:, None], padding=3, groups=channels)[..., :length])
        return finish(forward, x, weight, lambda tensor: tensor.transpose(1, 2).reshape(-1, channels))
    yield "causal-conv1d", causal_conv1d
    yield "flash-linear-attention convolution", fla
    yield "torch conv1d + silu", plain


# ---- attention -------------------------------------------------------------------------------------------------------

def exact_attention(torch, q, k, v):
    """[heads, tokens, dim] in float32, causal."""
    factor = q.shape[0] // k.shape[0]
    k, v = (x.repeat_interleave(factor, dim=0) for x in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def attention_peers(torch, s, case, backward):
    length = document_length(s)

    def sdpa(backend):
        def make():
            attention = package("torch.nn.attention")
            backends = getattr(attention.SDPBackend, backend)
            shape = lambda heads: (s["documents"], heads, length, s["dim"])
            sizes = (s["heads"], s["keys"], s["keys"])
            sets = [[normal(torch, shape(heads)).requires_grad_(backward) for heads in sizes] for _ in range(turns(case))]

            def forward(q, k, v):
                with attention.sdpa_kernel(backends):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            # What the first tokens give does not depend on later ones, nor do the gradients of their queries.
            first = min(FOLLOWED, length)
            part = [x[0, :, :first].detach().float() for x in sets[0]]
            if not backward:
                return cycled(sets, forward), lambda: [(forward(*sets[0])[0, :, :first], exact_attention(torch, *part))]
            graphs = []
            for own in sets:
                out = forward(*own)
                graphs.append((out, own, torch.randn_like(out)))
            gradients = lambda out, own, gradient: torch.autograd.grad(out, own, gradient, retain_graph=True)

            def pairs():
                part[0].requires_grad_(True)
                expected, = torch.autograd.grad(exact_attention(torch, *part), part[0], graphs[0][2][0, :, :first].float())
                return [(gradients(*graphs[0])[0][0, :, :first], expected)]
            return cycled(graphs, gradients), pairs
        return make
    yield "torch SDPA, flash", sdpa("FLASH_ATTENTION")
    yield "torch SDPA, cuDNN", sdpa("CUDNN_ATTENTION")


def attention(torch, s, case):
    yield from attention_peers(torch, s, case, False)


def attention_backward(torch, s, case):
    yield from attention_peers(torch, s, case, True)
