"""The studies gradlab ships, one file each; installed as `gradlab.experiments`."""
