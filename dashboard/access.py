"""Permissions that the dashboard asks for. The groups viewer and operator hold them."""

VIEW = "scheduling.view_policyrevision"
SWITCH_POLICY = "scheduling.switch_policy"
CONTROL_REPLICA = "inference.control_replica"
CANCEL_REQUEST = CONTROL_REPLICA
"""Who may stop a replica may stop one of its requests."""
