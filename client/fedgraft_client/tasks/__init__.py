"""Tasks: what a site predicts. A kind of task is one file here and one line below."""

from fedgraft_client.tasks.detection import Detection
from fedgraft_client.tasks.language_modelling import LanguageModelling
from fedgraft_client.tasks.multi_label import MultiLabel
from fedgraft_client.tasks.ordinal import Ordinal
from fedgraft_client.tasks.registry import build_task, known_tasks, register
from fedgraft_client.tasks.regression import Regression
from fedgraft_client.tasks.segmentation import Segmentation
from fedgraft_client.tasks.sequence_to_class import SequenceToClass
from fedgraft_client.tasks.single_label import SingleLabel
from fedgraft_client.tasks.survival import Survival
from fedgraft_client.tasks.tabular import tabular
from fedgraft_client.tasks.task import IGNORED, Answer, Task
from fedgraft_client.tasks.token_classification import TokenClassification

register("single-label", SingleLabel)
register("multi-label", MultiLabel)
register("ordinal", Ordinal)
register("regression", Regression)
register("survival", Survival)
register("tabular", tabular)
register("sequence-to-class", SequenceToClass)
register("token-classification", TokenClassification)
register("language-modelling", LanguageModelling)
register("segmentation", Segmentation)
register("detection", Detection)

__all__ = ["IGNORED", "Answer", "Task", "build_task", "known_tasks", "register"]
