"""FLoRA: the stack itself, exact.

Wang, Shen, He, Sun, Wang, Lyu, Li: FLoRA: Federated Fine-Tuning Large Language Models with
Heterogeneous Low-Rank Adaptations. NeurIPS 2024, arXiv 2409.05976.

    A = [p_1 s_1 A_1; ..; p_K s_K A_K],  B = [B_1 .. B_K],  B A = dW = sum_k p_k s_k B_k A_k

The server sends A and B; each client merges them into its base weights, W += B A, and starts a
fresh LoRA of its own rank. p_k s_k is multiplied into A in float32, so the stack is float32 unless
another dtype is asked for: rounding the products to bfloat16 would cost the exactness.
"""

from fastagg.handouts.choices import ClientStack
from fastagg.method import Method
from fastagg.weighting import Examples

METHOD = Method(
    name="flora",
    paper="FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank "
    "Adaptations (NeurIPS 2024)",
    arxiv="2409.05976",
    equation="A = [p_1 s_1 A_1; ..], B = [B_1 ..]",
    weights=Examples(),
    accumulators=("stack",),
    handout=ClientStack(),
)
