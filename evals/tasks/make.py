"""Makes the packaged tasks of this folder from the demo's held-out text: python evals/tasks/make.py"""

from pathlib import Path

from sinkquant.evaluate import build_tasks
from sinkquant.models import documents, read_text

if __name__ == "__main__":
    print(*build_tasks(documents(read_text(None, "evaluation")), Path(__file__).parent))
