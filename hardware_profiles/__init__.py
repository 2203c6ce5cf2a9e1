"""Target machines: what they execute, how this one is detected, and the lock that keeps measurements undisturbed."""

from paretune.hardware_profiles.detect import detect_local, fingerprint, package_version
from paretune.hardware_profiles.lock import MachineLock
from paretune.hardware_profiles.profile import Profile, load_profile, local_profile

__all__ = ["MachineLock", "Profile", "detect_local", "fingerprint", "load_profile", "local_profile", "package_version"]
