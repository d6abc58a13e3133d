from . import ops, reference
from .adapter import APTAdapter
