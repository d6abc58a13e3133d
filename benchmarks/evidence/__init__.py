"""`apt-ext results`: what the method does on real data, cell by cell, and the tables made of the cells.

The command line imports it as apt_ext.tools.checkout.evidence.

tasks    what is learned: models, data, sizes
packing  models and data of the tasks, gathered from installed packages into one directory
rows     what is trained, and how it is pruned
cell     one task, one row, one seed, one density: trained, measured, written as one line of a file of its task
store    the lines of cells-<task>.jsonl, one a cell: read, checked, replaced
runner   many cells, in one or several processes
gathered the cells of each task, by row, density and seed
pictures plots of the cells that are there
report   tables of them, with the plots
"""
