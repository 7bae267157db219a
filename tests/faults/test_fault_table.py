"""Which test injects which fault. Where a test is renamed or removed, the table below says so by failing.

A file may hold more on the same fault than the table names; `tests/soak.py` is run by hand.

    fault                                           test
    SIGTERM to any host                             test_faults_processes.test_p1_sigterm_and_sigkill_of_one_of_two_and_p3_resumes_bitwise
                                                    test_faults_processes.test_p1_a_second_sigterm_ends_a_single_process_at_once
    SIGKILL in a step                               test_faults_processes.test_p1_sigterm_and_sigkill_of_one_of_two_and_p3_resumes_bitwise
    SIGKILL in a save                               test_faults_processes.test_p1_sigkill_between_commit_and_verification
                                                    soak.main
    half-written and foreign step directories       test_faults_checkpoints.test_p2_half_written_and_foreign_directories_are_ignored
    a committed checkpoint damaged                  test_faults_checkpoints.test_p2_flipped_bits_never_pass
                                                    test_faults_checkpoints.test_p2_truncated_zeroed_and_deleted_files_are_walked_back_from
                                                    test_faults_checkpoints.test_p2_no_good_step_left_is_refused_and_nothing_is_overwritten
                                                    test_faults_checkpoints.test_p2_strict_refuses_at_once
    a disk that is full, or cannot be written       test_faults_processes.test_p5_a_disk_that_fills_is_noticed_retried_once_and_fatal
                                                    test_faults_runs.test_p5_a_directory_that_cannot_be_written_is_found_at_the_start
                                                    test_faults_runs.test_p5_too_little_room_for_the_checkpoints_is_found_at_the_start
                                                    test_faults_checkpoints.test_p2_nothing_is_deleted_before_its_successor_is_verified
    a loss or gradient that is not finite           test_faults_runs.test_p5_a_poisoned_pair_changes_nothing_and_is_named
                                                    test_faults_runs.test_p5_too_many_skipped_in_a_row_end_the_run_and_nothing_bad_is_saved
                                                    test_integrity.test_p5_values_that_are_not_finite_are_never_verified
    a process that hangs or is dead                 test_faults_processes.test_p1_a_hanging_step_dumps_stacks_and_ends_both
                                                    test_faults_processes.test_p1_a_process_that_fails_ends_the_other
    a row that is no pair                           test_faults_runs.test_p7_forty_malformed_rows_are_each_named_and_none_is_shown
                                                    test_faults_runs.test_p7_any_bytes_give_pairs_bad_rows_or_one_error
                                                    test_rows.test_malformed_rows
    an empty response                               test_faults_inputs.test_p7_an_empty_response_is_refused_in_every_form
                                                    test_faults_inputs.test_p7_a_response_that_begins_the_other_is_never_scored_as_nothing
                                                    test_faults_inputs.test_p7_where_one_text_begins_the_other_both_keep_a_response_or_the_row_is_refused
                                                    test_tokens.test_bad_responses
    a prompt or response that is too long           test_faults_inputs.test_p7_lengths_around_every_boundary
                                                    test_tokens.test_limits_hold_and_nothing_is_cut_in_vain
                                                    test_dataset.test_pairs_that_truncation_makes_equal
    equal responses, repeated pairs                 test_faults_inputs.test_p7_equal_responses_and_repeated_pairs_are_counted_and_said
                                                    test_faults_inputs.test_p5_pairs_of_equal_responses_train_nothing
                                                    test_dataset.test_counts
    a tokenizer that is not the model's             test_faults_inputs.test_p7_a_swapped_tokenizer_is_refused
                                                    test_tokenizer_fit.test_ids_beyond_the_embedding
                                                    test_tokenizer_fit.test_another_eos
                                                    test_tokenizer_fit.test_an_added_token_beyond_the_embedding_is_refused_where_it_is_used
    ids of p and x that are not ids of p ⊕ ids of x test_tokens.test_p_leaves_the_ids_of_x_alone
                                                    test_tokens.test_a_template_that_cannot_place_p
                                                    test_chat_families.test_with_p_the_ids_spell_the_template_s_text_of_p_and_x
    padding that is the end of sequence             test_faults_inputs.test_the_end_of_sequence_receives_gradient_where_it_is_the_padding_too
                                                    test_tokens.test_bos_once_eos_once
    a vocabulary that does not divide               test_logprobs.test_vocabularies_of_real_size
                                                    test_logprobs.test_columns_that_only_fill_up_never_count
                                                    test_mesh.test_a_vocabulary_that_no_axis_divides
    another mesh when a run goes on                 test_faults_inputs.test_p4_a_run_goes_on_on_another_mesh
                                                    test_faults_checkpoints.test_p4_any_mesh_restores_every_value_bitwise
    fewer or more hosts                             test_faults_processes.test_p4_two_processes_one_and_two_again_see_the_same_pairs
    other data, seed, batch, p or beta              test_faults_checkpoints.test_p7_a_changed_run_is_refused_with_a_diff
                                                    test_faults_checkpoints.test_p7_one_changed_byte_and_two_swapped_rows_of_the_data_are_refused
                                                    test_faults_checkpoints.test_p7_allow_change_goes_on_and_says_so
    a stale reference cache                         test_faults_runs.test_p2_the_reference_cache_misses_on_any_change_of_its_inputs
                                                    test_faults_runs.test_p2_a_cache_that_is_not_the_models_is_scored_again
                                                    test_faults_processes.test_p1_sigkill_while_scoring_continues_where_it_stopped
    weights cut short, a shard missing              test_weights.test_faults_are_named_before_anything_is_loaded
                                                    test_weights.test_a_download_that_was_cut_short_is_named
                                                    test_weights.test_weights_are_checked_before_any_device_is_touched
                                                    test_corruption.test_train_ends_with_2_and_leaves_nothing
                                                    test_hub.test_a_download_cut_short_is_named
    weights of another type                         test_weights.test_each_tensor_is_read_in_its_own_type
                                                    test_weights.test_types_are_said_and_those_that_are_rounded
                                                    test_weights.test_numbers_that_are_not_finite_are_refused_by_tensor
                                                    test_faults_inputs.test_p7_weights_that_are_no_numbers_are_refused_by_file_and_tensor
    tensors missing, extra, mis-shaped or tied      test_weights.test_all_faults_are_in_one_error
                                                    test_weights.test_a_tied_model_may_hold_its_head_where_it_is_the_embedding
    a clock that is wrong                           test_faults_inputs.test_p2_a_clock_that_goes_backwards_changes_nothing
                                                    test_faults_checkpoints.test_p2_latest_is_the_highest_verified_step_whatever_the_clock_says
                                                    test_lease.test_p2_the_lease_of_another_host_is_respected_while_it_is_touched
    two runs in one directory                       test_faults_processes.test_p2_two_runs_on_one_directory_the_second_is_refused
                                                    test_lease.test_p2_of_many_runs_that_find_a_stale_lease_one_gets_it
    other versions of libraries                     test_faults_checkpoints.test_p3_other_versions_are_said_and_with_strict_refused
    a length that would compile again               test_faults_inputs.test_p7_nothing_compiles_after_the_first_step_and_another_shape_is_an_error
    processes that differ                           test_faults_hosts.test_p1_processes_that_differ_are_refused_by_name
                                                    test_processes.test_what_differs_is_named_on_every_process
    a best checkpoint of other held-out pairs       test_during_training.test_the_best_of_other_held_out_pairs_does_not_count
    a signal outside of a step                      test_loop.test_a_signal_before_the_first_step_stops_with_75
                                                    test_during_training.test_a_signal_saves_before_an_evaluation_and_the_next_start_makes_up_for_it
    a step under another name or of another run     test_checkpoint.test_a_step_under_another_number_is_named_and_never_counted
                                                    test_checkpoint.test_two_steps_that_were_swapped_are_neither_loaded_nor_deleted
                                                    test_checkpoint.test_a_step_of_another_run_is_named_and_never_counted
    damaged side files                              test_metrics.test_a_damaged_line_stops_no_run
                                                    test_lease.test_p2_a_damaged_lease_stops_no_run
    a save that takes long                          test_faults_processes.test_p1_a_slow_save_is_no_hang
    the end of a schedule moved                     test_identity.test_the_end_of_a_schedule_counts_where_the_rate_follows_from_it
    a judge that is broken or hostile               test_judge.test_an_endpoint_that_gives_no_reply_is_one_error
                                                    test_judge.test_a_body_that_is_no_reply_is_malformed
                                                    test_judge.test_the_pattern_is_linear
    a chat template that fails or never ends        test_tokens.test_whatever_a_template_raises_the_row_is_bad
                                                    test_tokens.test_a_template_that_does_not_end
    YAML that says two things or too much           test_config.test_yaml_that_says_two_things_or_too_much_is_refused
    no row that can be used                         test_dataset.test_nothing_usable
    storage without links, or without another call  test_lease.test_p2_a_lease_needs_no_links
                                                    test_files.test_a_file_system_that_lacks_a_call_is_found_at_the_start
    a kernel that is wrong on a device              test_kernel_check.test_a_broken_kernel_is_found
                                                    test_kernel_check.test_auto_takes_dense_in_place_of_a_kernel_that_is_wrong_here
    other data under the names that tune knew       test_tune.test_a_finished_run_counts_for_the_content_of_its_files
    two at one name, or one taken away              test_export.test_of_two_exports_to_one_name_the_second_is_told
                                                    test_export.test_a_step_that_is_deleted_while_it_is_read_is_one_error
    a run that cannot learn                         test_program.test_a_run_that_cannot_learn_is_warned_of
                                                    test_metrics.test_a_loss_far_above_the_first_is_said_once
    one host stands still, its disk fills, files go test_faults_hosts_in_a_run.test_p1_a_process_that_is_stopped_for_40_s_ends_both_and_nothing_is_lost
                                                    test_faults_hosts_in_a_run.test_p1_sigterm_while_compiling_or_saving_gives_75
                                                    test_faults_hosts_in_a_run.test_p5_a_disk_that_is_full_on_one_host_alone_ends_both
                                                    test_faults_hosts_in_a_run.test_p5_a_directory_that_is_removed_in_mid_run_is_one_error
                                                    test_faults_hosts_in_a_run.test_p1_other_weights_on_one_host_are_refused
    outputs that two commands write                 test_faults_outputs.test_p2_the_second_command_at_one_output_is_refused
                                                    test_faults_outputs.test_p2_two_generations_at_once_the_second_is_told_and_a_killed_one_goes_on
                                                    test_faults_outputs.test_p1_generation_of_two_processes_with_outputs_of_their_own_goes_on
    held-out pairs exchanged under a finished run   test_tune.test_finished_runs_are_measured_on_other_held_out_pairs
                                                    test_during_training.test_a_finished_run_is_measured_anew_on_other_held_out_pairs
                                                    test_tune.test_a_finished_run_counts_for_the_content_of_a_hub_data_set
    a damaged tune.json                             test_tune.test_a_damaged_tune_json_is_set_aside
    parquet of other types                          test_rows.test_parquet_of_other_types
                                                    test_rows.test_parquet_with_a_column_twice
    damage, kills and other meshes with adapters    test_faults_adapters.test_p2_flipped_bits_of_adapters_never_pass_and_the_same_command_goes_on
                                                    test_faults_adapters.test_p3_any_number_of_interruptions_of_adapters_is_bitwise
                                                    test_faults_adapters.test_p4_any_mesh_restores_adapters_bitwise_beside_the_same_base
                                                    test_faults_adapters.test_p1_sigkill_of_one_of_two_with_adapters_and_p3_resumes_bitwise
    numbers that float32 does not hold              test_config.test_a_refusal_of_a_value_names_its_key
                                                    test_objective.test_a_loss_that_begins_beyond_float32_is_refused
"""  # noqa: E501 (a table)

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROWS = __doc__.partition("    fault ")[2].splitlines()[1:]
LINE = re.compile(r"(?: {4}(\S.*?))? +(\w+)\.(\w+)")
"""A fault, left out where it is that of the line before; a file; a function."""


def test_every_test_of_the_table_is_there():
    lines = [LINE.fullmatch(row) for row in ROWS]
    assert all(lines) and len([line for line in lines if line[1]]) == 50
    missing = []
    for _, file, function in (line.groups() for line in lines):
        (path,) = TESTS.rglob(f"{file}.py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if function not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
            missing.append(f"{file}.{function}")
    assert not missing
