// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The vhost-user daemon: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use log::{LevelFilter, error};
use virtio_iommu::causes::with_causes;
use virtio_iommu::vhost_user::{Arguments, serve, watch_if_asked};

fn main() -> ExitCode {
    if let Some(code) = watch_if_asked() {
        return code;
    }
    let arguments = Arguments::parse();
    env_logger::Builder::new()
        // How much is logged can be changed later, and is decided before this is asked.
        .filter_level(LevelFilter::Trace)
        // What it logs is the guest's doing, line by line; the device counts it and says what matters.
        .filter_module("virtio_queue", LevelFilter::Off)
        .init();
    log::set_max_level(arguments.log_level);
    match serve(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{}", with_causes(&failure));
            ExitCode::from(failure.exit_code())
        }
    }
}
