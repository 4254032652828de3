"""`AWS()`: EC2 instances of this run's own."""

from .provider import AWS as AWS
