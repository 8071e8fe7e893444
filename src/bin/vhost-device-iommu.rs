// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The vhost-user daemon: arguments in, exit code out.

use std::process::ExitCode;

use clap::Parser;
use log::error;
use virtio_iommu::causes::with_causes;
use virtio_iommu::launch::output::{put, say};
use virtio_iommu::launch::show;
use virtio_iommu::reserved::report;
use virtio_iommu::vhost_user::{
    Arguments, CAPABILITIES, asks_for_capabilities, check, finish_log, serve, start_log, watch_if_asked,
};

fn main() -> ExitCode {
    if let Some(code) = watch_if_asked() {
        return code;
    }
    if asks_for_capabilities(std::env::args_os()) {
        return print(&format!("{CAPABILITIES}\n"));
    }
    let arguments = Arguments::parse();
    start_log(arguments.log_level, arguments.log_format);
    let result = if arguments.check {
        check(&arguments).map(|plan| print(&if arguments.json { report::to_json(&plan) } else { show::plan(&plan) }))
    } else {
        serve(&arguments).map(|()| ExitCode::SUCCESS)
    };
    let code = result.unwrap_or_else(|failure| {
        error!("{}", with_causes(&failure));
        ExitCode::from(failure.exit_code())
    });
    finish_log();
    code
}

/// Prints what was asked for.
fn print(text: &str) -> ExitCode {
    match put(text) {
        Ok(_) => ExitCode::SUCCESS,
        Err(failure) => {
            say(format_args!("vhost-device-iommu: {}", with_causes(&failure)));
            ExitCode::FAILURE
        }
    }
}
