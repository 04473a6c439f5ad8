"""The report page: one HTML file with the curves, the time, every rollout and the settings of one or several runs.

`python -m ludic.report RUN [RUN2 ...]` writes it from the files that a run leaves, also while the run goes on. It reads files
only: nothing of training or inference is imported, and the page makes no network requests. Bokeh draws the charts; it is an
optional dependency (the extra `report`).
"""
