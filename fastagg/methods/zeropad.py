"""Zero-padding: FedIT on factors padded with zeros to the largest rank.

The baseline of FLoRA and HetLoRA for unequal ranks, as in Cho et al., arXiv 2401.06432, and
Wang et al., arXiv 2409.05976.

    A = sum_k p_k [A_k; 0],  B = sum_k p_k [B_k 0];   client k gets the first r_k rows and columns

Not exact: beside FedIT's cross terms, the rows that few clients own are shrunk by the zeros of the
others. Unlike scalings are treated as in FedIT.
"""

from fastagg.handouts.choices import FirstRows
from fastagg.method import Method
from fastagg.weighting import Examples

METHOD = Method(
    name="zeropad",
    paper="Zero-padding, the baseline of HetLoRA (EMNLP 2024) and FLoRA (NeurIPS 2024)",
    arxiv="2401.06432",
    equation="A = sum p_k [A_k; 0], B = sum p_k s_k [B_k 0] / s; the first r_k rows",
    weights=Examples(),
    accumulators=("means",),
    handout=FirstRows(),
)
