"""How each plot of a record is drawn; :mod:`fastagg.bench.plots` tells which there are."""
