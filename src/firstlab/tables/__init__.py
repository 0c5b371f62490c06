"""Every table and figure of the paper, ours beside the paper's, from recorded results alone: no model, no data, no GPU.

`config`   settings (conf/tables.yaml); which runs each cell needs is `firstlab.config.grid`
`records`  recorded runs, and which of them belongs to which cell
`cells`    the run nearest to a skip level; means over seeds, intervals, paired tests
`quality`, `speed`, `analysis`   the tables
`table`, `pictures`, `page`      Markdown, CSV and LaTeX; SVG pictures; the page with all of it
"""
