"""FlexLoRA: the best approximation of dW at each client's rank.

Bai, Chen, Qian, Yao, Li: Federated Fine-tuning of Large Language Models under Heterogeneous Tasks
and Client Resources. NeurIPS 2024, arXiv 2402.11505.

    dW = sum_k p_k s_k B_k A_k = U S V^T,   A_k = V_r^T,  B_k = U_r S_r / s_k  with r = r_k

By Eckart and Young s_k B_k A_k is the best rank-r_k approximation of dW in the Frobenius norm. One
decomposition at the largest rank serves all clients, and dW is not formed for it.
"""

from fastagg.handouts.choices import TruncatedSVD
from fastagg.method import Method
from fastagg.weighting import Examples

METHOD = Method(
    name="flexlora",
    paper="Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client "
    "Resources (NeurIPS 2024)",
    arxiv="2402.11505",
    equation="dW = sum p_k s_k B_k A_k = U S V^T; A_k = V_r^T, B_k = U_r S_r / s_k",
    weights=Examples(),
    accumulators=("stack", "dense"),
    handout=TruncatedSVD(),
)
