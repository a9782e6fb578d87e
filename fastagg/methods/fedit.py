"""FedIT: the factors averaged apart; equal ranks only.

Zhang, Vahidian, Kuo, Li, Zhang, Yu, Zhou, Wang, Chen: Towards Building the Federated GPT: Federated
Instruction Tuning. ICASSP 2024, arXiv 2305.05644.

    A = sum_k p_k A_k,  B = sum_k p_k B_k

Not exact: s B A holds the cross terms p_k p_l B_k A_l. Where the clients' scalings differ, which the
paper does not consider, s_k B_k takes the place of B_k, and each client gets it divided by its own
s_k; with one scaling for all that is the paper's average.
"""

from fastagg.handouts.choices import FirstRows
from fastagg.method import Method
from fastagg.weighting import Examples

METHOD = Method(
    name="fedit",
    paper="Towards Building the Federated GPT: Federated Instruction Tuning (ICASSP 2024)",
    arxiv="2305.05644",
    equation="A = sum p_k A_k, B = sum p_k s_k B_k / s",
    weights=Examples(),
    accumulators=("means",),
    handout=FirstRows(whole=True),
    equal_ranks=True,
)
