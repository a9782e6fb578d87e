"""The CUDA kernels beside what their users would write, and beside what the hardware can do.

``python -m bench.gpu.run --record FOLDER``; ``bench/gpu.sh FOLDER`` builds and tests first.
"""
