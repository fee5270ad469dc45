#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>

#include "flash_mla/error.h"
#include "text/deepseek/renderer.h"

namespace flash_mla::text::deepseek {
namespace {

constexpr std::string_view kToolsV4 =
    "## Tools\n\n"
    "You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "
    "\"<｜DSML｜tool_calls>\" block like the following:\n\n"
    "<｜DSML｜tool_calls>\n"
    "<｜DSML｜invoke name=\"$TOOL_NAME\">\n"
    "<｜DSML｜parameter name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</｜DSML｜parameter>\n"
    "...\n"
    "</｜DSML｜invoke>\n"
    "<｜DSML｜invoke name=\"$TOOL_NAME2\">\n"
    "...\n"
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>\n\n"
    "String parameters should be specified as is and set `string=\"true\"`. For all other types (numbers, "
    "booleans, arrays, objects), pass the value in JSON format and set `string=\"false\"`.\n\n"
    "If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside "
    "<think>...</think> BEFORE any tool calls or final response.\n\n"
    "Otherwise, output directly after </think> with tool calls or final response.\n\n"
    "### Available Tool Schemas\n\n";
constexpr std::string_view kEndOfToolsV4 =
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n";

constexpr std::string_view kMostEffort =
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root "
    "cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial "
    "scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n";

/// What classifies a user's message instead of answering it. Only "action" begins an answer.
constexpr std::string_view kTasks[] = {"action", "query", "authority", "domain", "title", "read_url"};

class V4 : public Renderer {
 public:
  explicit V4(const ChatInput& input) : Renderer(input, kToolsV4, kEndOfToolsV4, "tool_calls") {
    const OrderedJson* effort = find(input.variables, "reasoning_effort");
    if (effort != nullptr && *effort != "high" && *effort != "max") {
      throw InvalidArgument("chat_template_kwargs.reasoning_effort: expected \"high\" or \"max\"");
    }
    most_effort_ = effort != nullptr && *effort == "max";
    merge_results();
    for (std::size_t i = 0; i < turns_.size(); ++i) {
      if (turns_[i].role != "user" && tools_of(i) != nullptr) drop_thinking_ = false;
    }
  }

  std::vector<TextPart> render() {
    static constexpr std::string_view kKept[] = {"user", "system", "assistant", "latest_reminder"};
    if (thinking_ && drop_thinking_) drop_old(kKept);
    find_last_user();
    if (thinking_ && most_effort_) prompt_.own(kMostEffort);
    for (std::size_t i = 0; i < turns_.size(); ++i) {
      put(i);
      put_transition(i);
    }
    return prompt_.take();
  }

 private:
  /// Results of tools are words of the user, in the order of the calls; users in a row are one.
  void merge_results() {
    std::vector<Turn> merged;
    std::map<std::string, std::size_t> order;  // of the last calls, by identifier
    for (Turn& turn : turns_) {
      const bool result = turn.role == "tool";
      if (!result && turn.role != "user") {
        read_task(turn);
        merged.push_back(std::move(turn));
        continue;
      }
      Block block{text_of(turn), result ? string_of(*turn.message, "tool_call_id") : "", result};
      if (merged.empty() || merged.back().role != "user" || (!result && !merged.back().task.empty())) {
        static const OrderedJson kResults = {{"role", "user"}};
        if (!result) read_task(turn);
        merged.push_back({result ? &kResults : turn.message, turn.index, "user", turn.task, {}});
      }
      merged.back().blocks.push_back(std::move(block));
    }
    turns_ = std::move(merged);
    for (Turn& turn : turns_) {
      if (turn.role == "assistant") {
        read_order(turn, order);
      } else if (turn.role == "user" && !order.empty()) {
        sort_results(turn.blocks, order);
      }
    }
  }

  static void read_task(Turn& turn) {
    const OrderedJson* task = find(*turn.message, "task");
    if (task == nullptr) return;
    if (!task->is_string() ||
        std::ranges::find(kTasks, task->get_ref<const std::string&>()) == std::end(kTasks)) {
      fail(turn, fmt::format(".task: expected one of {}", fmt::join(kTasks, ", ")));
    }
    turn.task = task->get<std::string>();
  }

  static void read_order(const Turn& turn, std::map<std::string, std::size_t>& order) {
    const OrderedJson* calls = find_some(*turn.message, "tool_calls");
    if (calls == nullptr || !calls->is_array()) return;
    order.clear();
    for (std::size_t i = 0; i < calls->size(); ++i) {
      if (const std::string id = (*calls)[i].is_object() ? string_of((*calls)[i], "id") : ""; !id.empty()) {
        order[id] = i;
      }
    }
  }

  static void sort_results(std::vector<Block>& blocks, const std::map<std::string, std::size_t>& order) {
    std::vector<Block> results;
    for (const Block& block : blocks) {
      if (block.result) results.push_back(block);
    }
    std::ranges::stable_sort(results, {}, [&](const Block& block) {
      const auto it = order.find(block.call);
      return it == order.end() ? 0 : it->second;
    });
    std::size_t next = 0;
    for (Block& block : blocks) {
      if (block.result) block = results[next++];
    }
  }

  void put(std::size_t i) {
    const Turn& turn = turns_[i];
    if (turn.role == "system" || turn.role == "developer") {
      const std::string content = text_of(turn);
      if (turn.role == "developer") {
        if (content.empty()) fail(turn, ".content is empty, expected what the developer says");
        prompt_.own(kUser);
      }
      prompt_.client(content);
      put_tools(i);
      put_response_format(i);
    } else if (turn.role == "user") {
      prompt_.own(kUser);
      put_blocks(turn.blocks);
    } else if (turn.role == "latest_reminder") {
      prompt_.own(kReminder);
      prompt_.client(text_of(turn));
    } else if (turn.role == "assistant") {
      put_assistant(i);
    } else {
      fail_role(turn, "system, developer, user, assistant, tool or latest_reminder");
    }
  }

  void put_blocks(const std::vector<Block>& blocks) {
    for (std::size_t k = 0; k < blocks.size(); ++k) {
      if (k > 0) prompt_.own("\n\n");
      if (blocks[k].result) prompt_.own("<tool_result>");
      prompt_.client(blocks[k].text);
      if (blocks[k].result) prompt_.own("</tool_result>");
    }
  }

  void put_assistant(std::size_t i) {
    const Turn& turn = turns_[i];
    const bool answers_task = i > 0 && !turns_[i - 1].task.empty();
    if (thinking_ && !answers_task && (!drop_thinking_ || static_cast<long>(i) > last_user_)) {
      prompt_.client(reasoning_of(turn));
      prompt_.own(kEndThink);
    }
    prompt_.client(text_of(turn));
    put_calls(turn, /*loose=*/true);
    const OrderedJson* open = find(*turn.message, "wo_eos");
    if (open == nullptr || *open != true) prompt_.own(kEnd);
  }

  /// What begins an answer, or the task's token, where neither stands already.
  void put_transition(std::size_t i) {
    const Turn& turn = turns_[i];
    if (!is_last(i)) {
      const std::string& next = turns_[i + 1].role;
      if (next != "assistant" && next != "latest_reminder") return;
    } else if (!generate_) {
      return;
    }
    if (turn.task.empty()) {
      if (turn.role != "user" && turn.role != "developer") return;
      prompt_.own(kAssistant);
      prompt_.own(thinking_ && (!drop_thinking_ || static_cast<long>(i) >= last_user_) ? kThink : kEndThink);
      return;
    }
    if (turn.task == "action") {
      prompt_.own(kAssistant);
      prompt_.own(thinking_ ? kThink : kEndThink);
    }
    prompt_.own(fmt::format("<｜{}｜>", turn.task));
  }

  bool most_effort_ = false;
};

}  // namespace

std::vector<TextPart> render_v4(const ChatInput& input) { return V4(input).render(); }

}  // namespace flash_mla::text::deepseek
