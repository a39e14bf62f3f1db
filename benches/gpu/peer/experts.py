"""Peers of routed experts: bitsandbytes' codes decoded for torch's grouped product, resident bf16, loops, transformers' own module."""
import math

from peer import DEVICE, Absent, Routing, nf4, normal, package, quantised

# K8: the one public fused kernel of this kind.
GROUPED_NF4 = "grouped-nf4-gemm (K8)"
# Rows, in the order of experts, whose experts are judged.
JUDGED = 512


def grouped_mm(torch):
    found = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if found is None:
        raise Absent("torch has no grouped_mm")
    return found


def stacked_codes(torch, s):
    """Codes of all experts as one matrix."""
    return nf4(torch, s["experts"] * s["outputs"], s["inputs"])


def resident_weights(torch, s):
    return normal(torch, (s["experts"], s["outputs"], s["inputs"]), 1 / math.sqrt(s["inputs"]))


def judged(routing, result, rows, weight_of):
    """Results of some experts beside float32 products of their rows."""
    return [(result[span], rows[span].float() @ weight_of(expert)) for expert, span in routing.spans(JUDGED)]


def grouped(torch, s, case):
    shape = (s["experts"], s["outputs"], s["inputs"])

    def dequantised():
        functional, product, routing = package("bitsandbytes.functional"), grouped_mm(torch), Routing(torch, s)
        x, (codes, state) = normal(torch, (s["tokens"], s["inputs"])), stacked_codes(torch, s)
        weights = lambda: functional.dequantize_4bit(codes, state).view(shape)
        call = lambda: product(x[routing.token], weights().transpose(-2, -1), offs=routing.ends)
        return call, lambda: judged(routing, call(), x[routing.token], lambda e, all=weights(): all[e].float().T)

    def resident():
        product, routing = grouped_mm(torch), Routing(torch, s)
        x, weight = normal(torch, (s["tokens"], s["inputs"])), resident_weights(torch, s)
        call = lambda: product(x[routing.token], weight.transpose(-2, -1), offs=routing.ends)
        return call, lambda: judged(routing, call(), x[routing.token], lambda e: weight[e].float().T)

    def loop():
        routing = Routing(torch, s)
        x, weight = normal(torch, (s["tokens"], s["inputs"])), resident_weights(torch, s)
        bounds = routing.bounds

        def call():
            rows = x[routing.token]
            return torch.cat([rows[bounds[e]:bounds[e + 1]] @ weight[e].T for e in range(s["experts"])])
        return call, lambda: judged(routing, call(), x[routing.token], lambda e: weight[e].float().T)
    yield "bitsandbytes dequantize + torch grouped_mm", dequantised
    yield "torch grouped_mm, bf16 resident", resident
    yield "loop over experts, bf16 resident", loop
    yield GROUPED_NF4, lambda: fused_nf4(torch, s, "gemm_4bit_grouped")


def grouped_dx(torch, s, case):
    shape, rows = (s["experts"], s["outputs"], s["inputs"]), s["tokens"] * s["top"]

    def dequantised():
        functional, product, routing = package("bitsandbytes.functional"), grouped_mm(torch), Routing(torch, s)
        dy, (codes, state) = normal(torch, (rows, s["outputs"])), stacked_codes(torch, s)
        weights = lambda: functional.dequantize_4bit(codes, state).view(shape)
        call = lambda: product(dy, weights(), offs=routing.ends)
        return call, lambda: judged(routing, call(), dy, lambda e, all=weights(): all[e].float())

    def resident():
        product, routing = grouped_mm(torch), Routing(torch, s)
        dy, weight = normal(torch, (rows, s["outputs"])), resident_weights(torch, s)
        call = lambda: product(dy, weight, offs=routing.ends)
        return call, lambda: judged(routing, call(), dy, lambda e: weight[e].float())
    yield "bitsandbytes dequantize + torch grouped_mm", dequantised
    yield "torch grouped_mm, bf16 resident", resident
    yield GROUPED_NF4, lambda: fused_nf4(torch, s, "dgrad_4bit_grouped")


def fused_nf4(torch, s, function):
    """Its layout: codes [E, N, K / 2], float32 scales [E, N, K / 64], rows sorted by expert, experts without rows left out."""
    product = getattr(package("nf4_grouped"), function)
    forward, outputs, inputs = function == "gemm_4bit_grouped", s["outputs"], s["inputs"]
    codes, state = quantised(torch, normal(torch, (s["experts"] * outputs, inputs), 1 / math.sqrt(inputs)), nested=False)
    codes = codes.view(s["experts"], outputs, inputs // 2)
    scales = state.absmax.view(s["experts"], outputs, inputs // 64).float()
    routing = Routing(torch, s)
    used = [expert for expert, count in enumerate(routing.counts) if count]
    counts, used = [routing.counts[expert] for expert in used], torch.tensor(used, dtype=torch.int32, device=DEVICE[0])
    width = inputs if forward else outputs
    rows = normal(torch, (s["tokens"], width))[routing.token] if forward else normal(torch, (s["tokens"] * s["top"], width))

    def weight(expert):
        nibbles = torch.stack((codes[expert] >> 4, codes[expert] & 15), dim=-1).flatten(1).long()
        exact = state.code.float()[nibbles] * scales[expert].repeat_interleave(64, 1)
        return exact.T if forward else exact
    call = lambda: product(rows, codes, scales, counts, used)
    return call, lambda: judged(routing, call(), rows, weight)


def experts(torch, s, case):
    """K6: transformers' own module, as a model has it by default and with grouped products, bf16 resident."""
    def module(implementation):
        def make():
            family = package("transformers.models.qwen3_next.modeling_qwen3_next")
            config = package("transformers").Qwen3NextConfig(
                num_experts=s["experts"], num_experts_per_tok=s["top"], moe_intermediate_size=s["outputs"], hidden_size=s["inputs"])
            config._experts_implementation = implementation
            with torch.device(DEVICE[0]), torch.no_grad():
                own = family.Qwen3NextExperts(config).to(torch.bfloat16)
                for parameter in own.parameters():
                    parameter.normal_(0, 0.02).requires_grad_(False)
            routing = Routing(torch, s)
            weights = torch.rand((s["tokens"], s["top"]), device=DEVICE[0]) + 0.1
            weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16)
            x = normal(torch, (s["tokens"], s["inputs"]))
            call = lambda: own(x, routing.chosen, weights)

            def pairs():
                result, expected = call()[:4], []
                for token in range(4):
                    row, total = x[token].float(), 0
                    for place in range(s["top"]):
                        expert = routing.chosen[token, place]
                        gate, up = (own.gate_up_proj[expert].float() @ row).chunk(2)
                        inner = torch.nn.functional.silu(gate) * up
                        total = total + weights[token, place].float() * (own.down_proj[expert].float() @ inner)
                    expected.append(total)
                return [(result, torch.stack(expected))]
            return call, pairs
        return make
    yield "transformers Qwen3NextExperts, eager (its default)", module("eager")
    yield "transformers Qwen3NextExperts, grouped_mm", module("grouped_mm")


def grouped_lora(torch, s, case):
    rows, rank = s["tokens"] * s["top"], s["rank"]

    def operands():
        x, dy = normal(torch, (s["tokens"], s["inputs"])), normal(torch, (rows, s["outputs"]))
        b, hidden = normal(torch, (s["experts"], s["outputs"], rank), 0.02), normal(torch, (rows, rank))
        return Routing(torch, s), x, dy, b, hidden

    def pairs_of(routing, x, dy, b, hidden, result):
        pairs, sorted_x = [], x[routing.token].float()
        for e, span in routing.spans(JUDGED):
            pairs.append((result(e)[0], (dy[span].float() @ b[e].float()).T @ sorted_x[span]))
            pairs.append((result(e)[1], dy[span].float().T @ hidden[span].float()))
        return pairs

    def grouped_products():
        product = grouped_mm(torch)
        routing, x, dy, b, hidden = operands()

        def call():
            v = product(dy, b, offs=routing.ends)
            return product(v.T, x[routing.token], offs=routing.ends), product(dy.T, hidden, offs=routing.ends)

        def pairs():
            da, db = call()
            return pairs_of(routing, x, dy, b, hidden, lambda e: (da[e], db[e]))
        return call, pairs

    def loop():
        routing, x, dy, b, hidden = operands()
        bounds = routing.bounds

        def call():
            sorted_x = x[routing.token]
            results = []
            for e in range(s["experts"]):
                span = slice(bounds[e], bounds[e + 1])
                results.append(((dy[span] @ b[e]).T @ sorted_x[span], dy[span].T @ hidden[span]))
            return results

        def pairs():
            found = call()
            return pairs_of(routing, x, dy, b, hidden, lambda e: found[e])
        return call, pairs
    yield "torch grouped_mm", grouped_products
    yield "loop over experts", loop
