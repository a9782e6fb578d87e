"""HetLoRA's server: zero-padding with weights by the norm of each client's update.

Cho, Liu, Xu, Fahrezi, Joshi: Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation
Models. EMNLP 2024, arXiv 2401.06432.

    p_k = |S_k| / sum_l |S_l|,   |S_k| = |dW_k|_F,   dW_k = s_k B_k A_k   (sparsity-weighted)
    A = sum_k p_k [A_k; 0],  B = sum_k p_k [B_k 0];   client k gets the first r_k rows and columns

S_k are the singular values of the client's update of the module, so |S_k| is its Frobenius norm; it
is computed from r x r Gram matrices, module by module. The paper's weights are norms alone: the
number of examples does not enter, and a client of weight 0 takes no part. The rank self-pruning of
the paper is the clients' own work. Unlike scalings are treated as in FedIT.
"""

from fastagg.handouts.choices import FirstRows
from fastagg.method import Method
from fastagg.weighting import Norms

METHOD = Method(
    name="hetlora",
    paper="Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models "
    "(EMNLP 2024)",
    arxiv="2401.06432",
    equation="p_k = |s_k B_k A_k|_F / sum; A = sum p_k [A_k; 0], B = sum p_k s_k [B_k 0] / s; "
    "the first r_k rows",
    weights=Norms(),
    accumulators=("means",),
    handout=FirstRows(),
)
