"""What tests share: models, data, jobs, real ranks and what ranks run."""
