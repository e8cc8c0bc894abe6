"""A run folder -> a page: figures, tables and samples.

``run_folder`` reads the folder, ``figures`` draws, ``alignment`` aligns a few texts, ``page`` puts them into page.html.
"""
