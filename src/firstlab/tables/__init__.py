"""Every table and figure of the paper, ours beside the paper's, from recorded results alone: no model, no data, no GPU.

`records` recorded runs by cell; `cells` the run nearest to a skip level, means over seeds, intervals, paired tests;
`quality`, `speed`, `analysis` the tables; `table`, `pictures` how they are written; `config` settings.
"""
