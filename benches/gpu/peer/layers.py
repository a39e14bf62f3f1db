"""Peers of linear layers: bitsandbytes fused and in two steps, cuBLAS on resident bf16, PEFT's adapters."""
import math

from peer import DEVICE, ROWS, backward_of, cycled, decoded, nf4, normal, package, turns


def quantised_sets(torch, s, count, width):
    return [(normal(torch, (s["tokens"], width)), *nf4(torch, s["outputs"], s["inputs"])) for _ in range(count)]


def resident_sets(torch, s, count, width):
    shape = (s["outputs"], s["inputs"])
    return [(normal(torch, (s["tokens"], width)), normal(torch, shape, 1 / math.sqrt(s["inputs"]))) for _ in range(count)]


def linear(torch, s, case):
    if s["rank"] > 0:
        yield from adapted_peers(torch, s, backward=False)
        return
    count = turns(case)

    def quantised_call(product):
        sets = quantised_sets(torch, s, count, s["inputs"])

        def pairs():
            x, codes, state = sets[0]
            return [(product(*sets[0])[:ROWS], x[:ROWS].float() @ decoded(torch, codes, state, s["outputs"]).T)]
        return cycled(sets, product), pairs

    def fused():
        bnb = package("bitsandbytes")
        return quantised_call(lambda x, codes, state: bnb.matmul_4bit(x, codes.t(), quant_state=state))

    def in_two_steps():
        functional = package("bitsandbytes.functional")
        return quantised_call(lambda x, codes, state: x @ functional.dequantize_4bit(codes, state).T)

    def resident():
        sets = resident_sets(torch, s, count, s["inputs"])
        x, weight = sets[0]
        pairs = lambda: [((x @ weight.T)[:ROWS], x[:ROWS].float() @ weight.float().T)]
        return cycled(sets, lambda x, weight: x @ weight.T), pairs
    if s["nf4"]:
        yield "bitsandbytes matmul_4bit", fused
        yield "bitsandbytes dequantize + cuBLAS", in_two_steps
    yield "cuBLAS, bf16 resident", resident


def linear_dx(torch, s, case):
    if s["rank"] > 0:
        yield from adapted_peers(torch, s, backward=True)
        return
    count = turns(case)

    def in_two_steps():
        functional = package("bitsandbytes.functional")
        sets = quantised_sets(torch, s, count, s["outputs"])
        product = lambda dy, codes, state: dy @ functional.dequantize_4bit(codes, state)

        def pairs():
            dy, codes, state = sets[0]
            return [(product(*sets[0])[:ROWS], dy[:ROWS].float() @ decoded(torch, codes, state, s["outputs"]))]
        return cycled(sets, product), pairs

    def resident():
        sets = resident_sets(torch, s, count, s["outputs"])
        dy, weight = sets[0]
        pairs = lambda: [((dy @ weight)[:ROWS], dy[:ROWS].float() @ weight.float())]
        return cycled(sets, lambda dy, weight: dy @ weight), pairs
    yield "bitsandbytes dequantize + cuBLAS", in_two_steps
    yield "cuBLAS, bf16 resident", resident


# ---- PEFT ------------------------------------------------------------------------------------------------------------

WITHOUT = ", without its adapter"


def plain_layer(torch, s):
    layer = torch.nn.Linear(s["inputs"], s["outputs"], bias=False, dtype=torch.bfloat16, device=DEVICE[0])
    return layer.requires_grad_(False)


def quantised_layer(torch, s):
    bnb = package("bitsandbytes")
    layer = bnb.nn.Linear4bit(s["inputs"], s["outputs"], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    return layer.to(torch.bfloat16).to(DEVICE[0]).requires_grad_(False)


def adapted(torch, layer, rank):
    """The layer as PEFT wraps it, with a second factor that is not zero."""
    peft = package("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"])
    model = peft.get_peft_model(torch.nn.ModuleDict({"layer": layer}), config)
    wrapped = model.base_model.model["layer"]
    with torch.no_grad():
        for factor in wrapped.lora_B.values():
            factor.weight.normal_(0, 0.02)
    return wrapped


def adapted_peers(torch, s, backward):
    """Each layer with its adapter and without: the difference is what the adapter costs."""
    kinds = {"PEFT on bf16 Linear": plain_layer, "PEFT on bitsandbytes Linear4bit": quantised_layer}
    for name, make_layer in kinds.items():
        for suffix in ("", WITHOUT):
            def make(make_layer=make_layer, has_adapter=not suffix):
                layer = make_layer(torch, s)
                module = adapted(torch, layer, s["rank"]) if has_adapter else layer
                return layer_call(torch, s, module, has_adapter, backward)
            yield name + suffix, make


def layer_call(torch, s, module, has_adapter, backward):
    x = normal(torch, (s["tokens"], s["inputs"])).requires_grad_(backward)
    factors = [module.lora_A["default"].weight, module.lora_B["default"].weight] if has_adapter else []
    identity = torch.eye(s["inputs"], dtype=torch.bfloat16, device=DEVICE[0])

    def weight():
        """What the layer multiplies by, the adapter included, in float32."""
        with torch.no_grad():
            base = module.base_layer if has_adapter else module
            plain = base(identity).T.float()
            return plain + 2.0 * (factors[1].float() @ factors[0].float()) if has_adapter else plain
    if not backward:
        def forward():
            with torch.no_grad():
                return module(x)
        return forward, lambda: [(forward()[:ROWS], x[:ROWS].float() @ weight().T)]
    out = module(x)
    dy = normal(torch, (s["tokens"], s["outputs"]))
    call = backward_of(torch, out, (x, *factors), dy)
    return call, lambda: [(call()[0][:ROWS], dy[:ROWS].float() @ weight())]
