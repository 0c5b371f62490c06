"""Every table and figure of the paper, ours beside the paper's, from recorded results alone: no model, no data, no GPU.

paper.yaml, `paper`     the paper's numbers, as printed
`config`, `grid`        which runs each cell needs, and the command that makes them (conf/tables.yaml, conf/scale/)
`records`               result files, and which of them belongs to which cell
`cells`                 the run nearest to a skip level; means over seeds, intervals, paired tests
`quality`, `speed`, `analysis`   the tables
`table`, `pictures`, `page`      Markdown, CSV and LaTeX; SVG pictures; the page with all of it
"""
