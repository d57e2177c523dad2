"""The observations that the method's authors report, looked for in any data set and model.

Every question is answered by the search, and several reasoning sequences are drawn for it from the plain model.
``collect`` asks the model and gives plain rows; ``analyse`` makes the findings of them; ``write_study`` writes both
reports from the findings alone; ``study`` does all three.
"""

from latent_tool.evaluation.study.asking import collect
from latent_tool.evaluation.study.observations import FAILS, HOLDS, UNKNOWN, analyse, verdict
from latent_tool.evaluation.study.questions import Drawn, Question, attention_lift, word_f1
from latent_tool.evaluation.study.report import markdown_study, study_page, write_study
from latent_tool.evaluation.study.run import study

__all__ = [
    "FAILS",
    "HOLDS",
    "UNKNOWN",
    "Drawn",
    "Question",
    "analyse",
    "attention_lift",
    "collect",
    "markdown_study",
    "study",
    "study_page",
    "verdict",
    "word_f1",
    "write_study",
]
