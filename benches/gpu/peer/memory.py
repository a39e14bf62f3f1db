"""Peers of what memory limits: copies, NF4 both ways, norms, activations, AdamW."""
from peer import DEVICE, Absent, decoded, nf4, normal, package, quantised

LR, BETAS, EPSILON = 1e-4, (0.9, 0.999), 1e-8


def copy(torch, s, case):
    def plain():
        x = normal(torch, (s["elements"],))
        y = torch.empty_like(x)
        return lambda: y.copy_(x), lambda: [(y[:4096], x[:4096].float())]
    yield "torch copy_", plain


def dequantize(torch, s, case):
    def bitsandbytes():
        functional = package("bitsandbytes.functional")
        codes, state = nf4(torch, s["outputs"], s["inputs"])
        call = lambda: functional.dequantize_4bit(codes, state)
        rows = min(64, s["outputs"])
        return call, lambda: [(call()[:rows], decoded(torch, codes, state, rows))]
    yield "bitsandbytes dequantize_4bit", bitsandbytes


def nearest(torch, codebook, weight):
    """What a matrix is after the nearest codes of each block of 64 are taken."""
    blocks = weight.float().reshape(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    place = (blocks / absmax).unsqueeze(-1).sub(codebook.float()).abs().argmin(-1)
    return (codebook.float()[place] * absmax).reshape(weight.shape)


def judged_codes(torch, weight, call):
    rows = min(16, weight.shape[0])
    codes, state = call()
    return [(decoded(torch, codes, state, rows), nearest(torch, state.code, weight[:rows]))]


def quantize(torch, s, case):
    def bitsandbytes():
        weight = normal(torch, (s["outputs"], s["inputs"]), 0.02)
        call = lambda: quantised(torch, weight)
        return call, lambda: judged_codes(torch, weight, call)
    yield "bitsandbytes quantize_4bit", bitsandbytes


def quantize_fp8(torch, s, case):
    def bitsandbytes():
        shape = (s["outputs"], s["inputs"])
        codes = normal(torch, shape, 1.0, torch.float32).to(torch.float8_e4m3fn)
        scales = torch.rand([-(-extent // 128) for extent in shape], device=DEVICE[0]) * 0.01 + 0.01

        def weight():
            wide = scales.repeat_interleave(128, 0)[:shape[0]].repeat_interleave(128, 1)[:, :shape[1]]
            return (codes.to(torch.float32) * wide).to(torch.bfloat16)
        call = lambda: quantised(torch, weight())
        return call, lambda: judged_codes(torch, weight(), call)
    yield "torch FP8 to bf16 + bitsandbytes quantize_4bit", bitsandbytes


def norm(torch, s, case):
    def plain():
        x, weight = normal(torch, (s["tokens"], s["width"])), normal(torch, (s["width"],))
        call = lambda: torch.nn.functional.rms_norm(x, (s["width"],), weight, 1e-6)

        def pairs():
            part = x[:64].float()
            return [(call()[:64], part * torch.rsqrt(part.square().mean(-1, keepdim=True) + 1e-6) * weight.float())]
        return call, pairs
    yield "torch rms_norm", plain


def swiglu(torch, s, case):
    def with_call(make):
        gate, up = normal(torch, (s["tokens"], s["width"])), normal(torch, (s["tokens"], s["width"]))
        call = make(gate, up)
        return call, lambda: [(call()[:64], torch.nn.functional.silu(gate[:64].float()) * up[:64].float())]

    def liger():
        function = package("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        return with_call(lambda gate, up: lambda: function.apply(gate, up))
    yield "torch silu * up", lambda: with_call(lambda gate, up: lambda: torch.nn.functional.silu(gate) * up)
    yield "Liger SiLUMul", liger


def first_step(torch, gradient):
    """What AdamW makes of zeros in its first step: moments are unbiased, so it is the gradient over its own size."""
    return -LR * gradient / (gradient.abs() + EPSILON)


def optimizer(torch, s, make):
    def made():
        def prepared(tensors, elements):
            parameters = [torch.nn.Parameter(torch.zeros(elements, device=DEVICE[0])) for _ in range(tensors)]
            for parameter in parameters:
                parameter.grad = normal(torch, (elements,), 0.01, torch.float32)
            return parameters, make(parameters)

        def pairs():
            parameters, own = prepared(2, 1 << 20)
            own.step()
            return [(parameter, first_step(torch, parameter.grad)) for parameter in parameters]
        return prepared(s["tensors"], s["elements"])[1].step, pairs
    return made


def bitsandbytes_optimizer(name):
    return lambda parameters: getattr(package("bitsandbytes").optim, name)(parameters, lr=LR, betas=BETAS, eps=EPSILON, weight_decay=0.0)


def adamw(torch, s, case):
    fused = lambda parameters: torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=True)
    yield "torch AdamW(fused)", optimizer(torch, s, fused)
    yield "bitsandbytes AdamW", optimizer(torch, s, bitsandbytes_optimizer("AdamW"))


def adamw_8bit(torch, s, case):
    yield "bitsandbytes AdamW8bit", optimizer(torch, s, bitsandbytes_optimizer("AdamW8bit"))


def nf4_digests(torch, elements):
    """sha256 of bitsandbytes' codes and flat scales of the sample that `serve.rs` has; what ours must be equal to."""
    import hashlib
    if torch is None:
        raise Absent("torch is not installed or sees no GPU")
    place = torch.arange(elements, dtype=torch.int64)
    sample = ((place * 2654435761) % (1 << 32)).to(torch.float32) / 4294967296.0 - 0.5
    codes, state = quantised(torch, sample.to(torch.bfloat16).view(-1, 64).to(DEVICE[0]), nested=False)
    digest = lambda tensor: hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()
    return {"codes": digest(codes), "absmax": digest(state.absmax.float())}
