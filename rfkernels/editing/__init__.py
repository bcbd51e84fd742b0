"""Training-free editing: samples of one condition become samples of another, by the flow alone.

``edit`` with a method by name or as an object: :class:`FlowEdit` (no inversion), :class:`RFInversion`
(controlled both ways), :class:`UniEdit` (partial inversion, then a mask), :class:`RFEdit` and
:class:`FireFlowEdit` (inversion and sampling, with attention features shared by :class:`Features`).
"""

from rfkernels.editing.edit import METHODS, Edited, edit, get_method
from rfkernels.editing.features import Bank, Features, Key, attention_blocks
from rfkernels.editing.flow_edit import FlowEdit
from rfkernels.editing.inversion import FireFlowEdit, RFEdit
from rfkernels.editing.rf_inversion import RFInversion
from rfkernels.editing.setting import Method, Setting
from rfkernels.editing.uni_edit import UniEdit, region_mask

__all__ = [
    "METHODS",
    "Bank",
    "Edited",
    "Features",
    "FireFlowEdit",
    "FlowEdit",
    "Key",
    "Method",
    "RFEdit",
    "RFInversion",
    "Setting",
    "UniEdit",
    "attention_blocks",
    "edit",
    "get_method",
    "region_mask",
]
