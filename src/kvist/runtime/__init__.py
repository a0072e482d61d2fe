"""Requests, scheduler, batch, runner, sampler, engine. Token ids only: no text beneath the service layer."""
