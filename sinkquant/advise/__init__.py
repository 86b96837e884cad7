"""What each kind of protection is worth on a model."""

from sinkquant.advise.advise import advise
