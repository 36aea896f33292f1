"""Where backbones come from. A source is one file and one line here."""

from fedgraft_common.sources import cifar_resnet, directory, hub, tabular
from fedgraft_common.sources import timm as timm_models
from fedgraft_common.sources import torchvision as torchvision_models
from fedgraft_common.sources.source import Loaded, Source, find_source, register

register(Source("dir", directory.load))
register(Source("embedded", directory.load_embedded))
register(Source("hf", hub.load))
register(Source("timm", timm_models.load))
register(Source("torchvision", torchvision_models.load))
register(Source("cifar-resnet", cifar_resnet.load))
register(Source("tabular", tabular.load))

__all__ = ["Loaded", "Source", "find_source", "register"]
