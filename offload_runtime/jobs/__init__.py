"""Batch jobs: many long documents in, one JSON line each out, resumable after any end.

>>> job = Job("reports/", Path("out.jsonl"), load_template("summarize"), ctx=65536, long="map-reduce")
>>> run_job(job, ModelAnswerer(model))  # ModelAnswerer: offload_runtime.jobs.model_answers
"""

from .answers import Answer, Answerer
from .documents import find_documents
from .errors import DocumentError
from .job import Job
from .progress import LogLines, Watcher
from .prompts import load_template
from .runner import JobRun, Summary, run_job

__all__ = [
    "Answer",
    "Answerer",
    "DocumentError",
    "Job",
    "JobRun",
    "LogLines",
    "Summary",
    "Watcher",
    "find_documents",
    "load_template",
    "run_job",
]
