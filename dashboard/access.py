"""Permissions that the dashboard asks for. The groups viewer, operator and administrator hold them."""

VIEW = "scheduling.view_policyrevision"
SWITCH_POLICY = "scheduling.switch_policy"
CONTROL_REPLICA = "inference.control_replica"
USE_ADMIN = "controlplane.use_admin"
CANCEL_REQUEST = CONTROL_REPLICA
"""Who may stop a replica may stop one of its requests."""
