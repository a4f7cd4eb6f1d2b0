"""Audits of the settings of services: rules, findings, recommendations, changes."""
