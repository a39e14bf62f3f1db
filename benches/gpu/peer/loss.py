"""Peers of the frozen head with its loss."""
import math

from peer import DEVICE, normal, package

FLOOR = "two cuBLAS products (a floor, no loss)"
# Tokens whose loss and gradient are judged.
JUDGED = 8


def loss(torch, s, case):
    tokens, width, vocabulary = s["tokens"], s["width"], s["vocabulary"]

    def operands():
        x = normal(torch, (tokens, width)).requires_grad_(True)
        head = normal(torch, (vocabulary, width), 1 / math.sqrt(width))
        return x, head, torch.randint(vocabulary, (tokens,), device=DEVICE[0])

    def with_gradient(make_loss, share=1.0):
        x, head, labels = operands()
        call = lambda: torch.autograd.grad(make_loss(x, head, labels), x)

        def pairs():
            part = x[:JUDGED].detach().float()
            chunks = [part @ rows.float().T for rows in head.split(16_384)]
            wrong = torch.cat(chunks, dim=1).softmax(-1)
            wrong[torch.arange(JUDGED), labels[:JUDGED]] -= 1
            expected = sum(own @ rows.float() for own, rows in zip(wrong.split(16_384, dim=1), head.split(16_384)))
            return [(call()[0][:JUDGED], share * expected)]
        return call, pairs

    def logits():
        return with_gradient(lambda x, head, labels: torch.nn.functional.cross_entropy((x @ head.T).float(), labels, reduction="sum"))

    def liger():
        function = package("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction

        def own(x, head, labels):
            result = function.apply(x, head, labels)
            return result[0] if isinstance(result, tuple) else result
        return with_gradient(own, 1 / tokens)  # its reduction is the mean

    def cut():
        function = package("cut_cross_entropy").linear_cross_entropy
        return with_gradient(lambda x, head, labels: function(x, head, labels, reduction="sum"))

    def floor():
        x, head, _ = operands()
        x, gradient = x.detach(), normal(torch, (tokens, vocabulary))
        call = lambda: (x @ head.T, gradient @ head)

        def pairs():
            one, other = call()
            return [(one[:JUDGED, :4096], x[:JUDGED].float() @ head[:4096].float().T), (other[:JUDGED], gradient[:JUDGED].float() @ head.float())]
        return call, pairs
    yield "torch logits + cross_entropy", logits
    yield "Liger fused linear cross-entropy", liger
    yield "cut-cross-entropy", cut
    yield FLOOR, floor
