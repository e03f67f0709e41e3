"""Pages of the dashboard over what only the control plane knows: operators' tokens and tenants' offline work."""
