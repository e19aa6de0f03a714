"""BABILong (arXiv 2406.10149), qa1 to qa5: facts of a bAbI story scattered in a long text, and a question about them.

`babilong_qa1` and so on take bAbI's stories and PG-19's books from the folder `data`; `babilong_qa1_offline` and so on
make stories by the same rules, in RULER's noise: no files, and an easier background.
"""

from nemo_star.evaluation.babilong.catalog import tasks

__all__ = ["tasks"]
