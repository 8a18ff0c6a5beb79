"""Synthetic users: profiles of sessions with published shapes, mixes of them, and prefixes for traces without any."""

from mlpstorage.kvcache.synthetic.prefixes import with_prefixes
from mlpstorage.kvcache.synthetic.profile import Profile, Targets
from mlpstorage.kvcache.synthetic.profiles import PROFILES
from mlpstorage.kvcache.synthetic.streams import Mix, user_requests

__all__ = ["PROFILES", "Mix", "Profile", "Targets", "user_requests", "with_prefixes"]
