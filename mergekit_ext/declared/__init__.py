"""Declare each merge method once; mergekit's methods, FlexMerge's F and the adapters' rules follow.

One file holds the methods of one paper, or of papers with one form, and registers them when it is
imported; `methods()` imports all of them.
"""

from mergekit_ext.declared.method import ADAPTERS as ADAPTERS
from mergekit_ext.declared.method import BLOCKS as BLOCKS
from mergekit_ext.declared.method import MODELS as MODELS
from mergekit_ext.declared.method import Call as Call
from mergekit_ext.declared.method import Inputs as Inputs
from mergekit_ext.declared.method import Merged as Merged
from mergekit_ext.declared.method import Method as Method
from mergekit_ext.declared.method import methods as methods
from mergekit_ext.declared.method import register as register
