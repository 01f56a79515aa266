//! The real program on real processes: one module per behaviour that a user can see, the promises P1 to P6 by their names.
//! Programs to be patched are in `tests/fixtures`; tests that need root say so and are skipped without it.

mod at_rest;
mod build_from_source;
mod build_systems;
mod cancelled_requests;
mod confined_targets;
mod dry_run;
mod endurance;
mod forked_children;
mod guards;
mod headless_targets;
mod hooks;
mod journal;
mod p1_target_outlives_the_agent;
mod p2_all_or_nothing;
mod p3_quiescent;
mod p4_never_writable_and_executable;
mod p5_invisible;
mod p6_refuses_functions;
mod p6_refuses_objects;
mod p6_refuses_processes;
mod patch_and_revert;
mod patch_files;
mod patch_languages;
mod patch_references;
mod redirect;
mod replaced_executable;
mod run_command;
mod sandbox;
mod sandbox_servers;
mod sandboxed_attacks;
mod sandboxed_oddities;
mod signatures;
mod support;
mod target_changes_midway;
mod unloaded_modules;
