"""Number formats: one file for each says what a recipe may ask of it, what a linear becomes, and who loads that.

Nothing here imports torch; `schemes.codecs` does, and turns weights into those tensors and back.
"""

from sinkquant.schemes.inputs import INPUTS, InputFormat, input_format
from sinkquant.schemes.integers import INTEGERS
from sinkquant.schemes.loads import Loads
from sinkquant.schemes.registry import SCHEMES, backend_of, backends, find, packages_of, scheme_of
from sinkquant.schemes.scheme import DEFAULT_BACKEND, Scheme
from sinkquant.schemes.weight_format import PLAIN, WeightFormat, stored_form
